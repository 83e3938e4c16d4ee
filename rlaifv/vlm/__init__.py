"""What a checkpoint is and how it is spoken to."""
