"""Several runs side by side: what may be ranked, what differs, how masks overlap; table, plots and page."""
