"""What `warm.python()` starts: it stands for the forked process in the eyes of its caller."""

import json
import os
import signal
import socket
import sys

address, program, *arguments = sys.argv[1:]
parent = os.getppid()
server = socket.socket(socket.AF_UNIX)
server.connect(address)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: server.sendall(bytes([number])))
request = json.dumps([program, arguments, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8)], [0, 1, 2])
server.sendall(request)
server.settimeout(1)
while True:
    try:
        answer = server.recv(2)
        break
    except TimeoutError:
        # The forked kernel has another parent, so its parent is watched here.
        if "JPY_PARENT_PID" in os.environ and os.getppid() != parent:
            os._exit(1)
code = int.from_bytes(answer, signed=True) if answer else 1
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
