"""What a person looks at: panels, charts, facts of a run, and the page that holds them."""
