"""Objectives of few-step models: ``loss(student, teacher, batch, generator, ...) -> (loss, log)``, one per module.

Import each from its module, which bears its name: ``from ...objectives.cm import cm``.
"""
