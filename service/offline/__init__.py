"""`timesformer label`: an archive of videos to one Parquet table of labels.

videos.py   which videos there are: a folder, a list, an object store's prefix
rows.py     what is written of a video, and what of one that cannot be used
table.py    the table, written in blocks so that a killed run loses one at most
here.py     decoders and engine of this machine
cluster.py  the same on Ray Data: decoders on CPUs, engines on GPUs
run.py      all of it together
"""
