"""`t2i serve`: a queue of what is to be drawn, an HTTP API and a page over it, and a gallery of what was drawn."""
