"""Methods x known ratios and settings x seeds under one protocol, from the plan's file to the page."""
