"""``scinet top``: how runs fare, seen from their directories and from the endpoints of those that live."""
