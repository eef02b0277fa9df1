"""Hand-written communication over one mesh axis; functions are given, no model is known."""
