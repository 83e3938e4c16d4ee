"""The embedded world: drawn scenes, their language, and the checkpoints that live in it."""
