"""The methods that SCINet is compared with, one configuration key each; README.md lists them with their sources."""
