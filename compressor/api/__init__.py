"""The verbs, a module each: open, compute, write, and return a result."""
