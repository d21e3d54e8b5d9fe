"""Scores of label maps against references, and the tables that show them."""
