"""Studies: what one command measured once, a CSV and a few sentences in docs each."""
