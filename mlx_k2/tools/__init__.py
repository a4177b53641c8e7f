"""Tools that a model calls: MCP servers, and a module of Python functions served as one. Knows no model."""
