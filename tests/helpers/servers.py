"""`logitmix serve` in its own process."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx

CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}="


class Server:
    """Serves `folder` as the model `mixture` at alpha 0.4 until it is killed."""

    python_arguments = ("-m", "logitmix.cli")

    def __init__(self, folder, log, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log, self.flags = folder, log, flags
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        flags = ["--alpha", "0.4", "--served-model-name", "mixture", "--port", str(self.port)]
        command = [sys.executable, *self.python_arguments, "serve", str(self.folder), *flags, *self.flags]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        for _ in range(2400):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class TransformersServer(Server):
    """transformers' server, started in a process that cannot import vLLM."""

    python_arguments = (
        "-c",
        "import sys; sys.modules['vllm'] = None; from logitmix.cli.__main__ import main; sys.exit(main())",
    )
