r"""Ask a server of a mixture to complete a prompt at several alphas, with nothing but the standard library.

logitmix serve runs/quickstart/fixed_mixing --port 8000
python examples/serving_client.py --url http://localhost:8000 $'7+8-9+4=?\n'
"""

import argparse
import json
import urllib.request
from typing import Any


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The server's JSON answer. An error of the server is raised with its message."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"the server refused the request: {error.read().decode()}") from error


def model_name(url: str) -> str:
    """The name of the model that the server serves."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        return json.load(response)["data"][0]["id"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", help="default the model that the server serves")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.3, 1.0], help="0: policy, 1: anchor")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()
    model = args.model or model_name(args.url)
    for alpha in args.alphas:
        body = {
            "model": model,
            "prompt": args.prompt,
            "temperature": 0,
            "max_tokens": args.max_tokens,
            "alpha": alpha,  # the one field beside OpenAI's
        }
        answer = post(f"{args.url}/v1/completions", body)
        print(f"alpha {alpha:g}: {answer['choices'][0]['text']!r}")


if __name__ == "__main__":
    main()
