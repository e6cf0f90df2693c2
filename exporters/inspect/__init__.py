"""`l4q-inspect`: what a folder or file holds. Readers give `Source`s, `collect` counts, `show` prints."""
