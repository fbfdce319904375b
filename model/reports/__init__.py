"""HTML pages with plots: figures of a run come in, one file goes out. Never imports torch."""
