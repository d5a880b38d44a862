"""Studies: many runs that together answer a question, and what they came to."""
