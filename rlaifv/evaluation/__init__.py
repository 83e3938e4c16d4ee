"""What answers are worth: hallucination, recall, intervals, and feedback against the truth."""
