"""Losses: pure functions of logits, targets and masks; of a batch, or of each of its cells (method.md section 5)."""
