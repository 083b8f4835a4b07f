"""Steps 4 and 7 of a request: durable, ordered records in files on a shared filesystem.

record.py (bytes of one record), looking.py (folders of other nodes) < segment.py (immutable files of records) <
request_log.py, result_log.py; lease.py says which worker may write results; bell.py makes waiting short on one node.
"""

from tinker_hpc.log.bell import Bell
from tinker_hpc.log.lease import Lease
from tinker_hpc.log.record import Record, decode, encode
from tinker_hpc.log.request_log import LogReader, RequestLog
from tinker_hpc.log.result_log import ResultFinder, ResultLog, ResultReader

__all__ = [
    "Bell",
    "Lease",
    "LogReader",
    "Record",
    "RequestLog",
    "ResultFinder",
    "ResultLog",
    "ResultReader",
    "decode",
    "encode",
]
