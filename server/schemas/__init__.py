"""Requests and answers of the two dialects."""
