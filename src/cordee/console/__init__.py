"""What the pages for the machines ask: the map, the models, people's keys; and what they may have done."""
