"""Videos of a folder, a list or an object store come in, labels go out, without HTTP.

local.py         a few files, for `timesformer classify`
videos.py        which videos an archive has
rows.py          the row of a video, and of a video that cannot be used
table.py         the table, written in blocks so that a killed run loses at most one block
local_runner.py  decoders and engine of this machine
ray_runner.py    the same on Ray Data: decoders on CPUs, engines on GPUs
archive.py       `timesformer label`
"""
