"""`l4q-inspect`: what a folder or file holds. Readers give `Source`s, `counts` counts, `show` prints."""
