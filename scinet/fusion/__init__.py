"""The cross-modality fusion module and the state it keeps (method.md section 3), and dynamic thresholds (section 4)."""
