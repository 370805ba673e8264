"""Model families as data: a description (arch), two tables (families, names) and one forward pass (decoder)."""
