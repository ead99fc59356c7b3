"""What runs inside the sandboxed process: confine it, run the program, encode what it returns.

The files here are imported by a bare interpreter without the project on its path: the standard library alone, and as
little of it as possible, because every run pays for the imports.
"""
