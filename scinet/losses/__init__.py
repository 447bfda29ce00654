"""Losses: pure functions of logits, targets and masks, summed over classes (method.md section 5)."""
