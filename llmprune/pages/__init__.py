"""What HTML pages are made of: the page itself, tables, heat maps and charts, in one design."""
