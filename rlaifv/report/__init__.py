"""What a person looks at: figures, pages, views in notebooks."""
