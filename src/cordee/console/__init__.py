"""What people ask of a node and have it do: by the verbs, and by the pages for the machines."""
