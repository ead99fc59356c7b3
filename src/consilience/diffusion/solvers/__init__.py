"""Solvers of the probability-flow ODE and its SDEs: each makes a plan of linear updates, one loop runs them all."""
