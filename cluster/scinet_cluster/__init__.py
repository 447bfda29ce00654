"""Running SCINet on clusters: the launcher, and what it needs to know; may know ``scinet``, never the other way."""
