"""Training programs as people write them, interrupted at random moments, compared with their own plain run."""
