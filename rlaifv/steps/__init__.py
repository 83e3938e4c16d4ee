"""The paper, a file a step, in the paper's order."""
