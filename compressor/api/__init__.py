"""The verbs, a page each: read the options, open the model, compute, write, and return a result."""
