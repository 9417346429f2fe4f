"""What people ask of a node and have it do: by the verbs, and by the pages of the map, the models, the keys."""
