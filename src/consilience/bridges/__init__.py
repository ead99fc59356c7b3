"""Self-consistency inside other frameworks: one module each, with an extra of its own (inspect, dspy, langchain)."""
