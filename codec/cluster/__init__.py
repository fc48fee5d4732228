"""Many machines, through Ray (the extra `cluster`): a pool of workers, a manifest for resuming, a report.

`workers` knows nothing of pictures: a unit of work is whatever can be pickled. Ray is imported when a pool is opened.
"""
