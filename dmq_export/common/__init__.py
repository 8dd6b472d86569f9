"""What any part may need: files that appear whole, progress, memory, tables, the bundled models."""
