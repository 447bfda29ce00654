"""Towers, prompter, label graph, teacher; knows no data."""
