"""An MCP server of few lines whose tools break their own promises, or have schemas that Python cannot check."""

import json
import sys
from typing import Any

OBJECT: dict[str, Any] = {"type": "object"}
TOOLS: dict[str, dict[str, Any]] = {
    "unstructured": {"inputSchema": OBJECT, "outputSchema": {"type": "object", "required": ["x"]}},
    "half": {"inputSchema": OBJECT},
    "named": {"inputSchema": {**OBJECT, "properties": {"x": {"type": "string", "pattern": "^\\p{L}+$"}}}},
    "nowhere": {"inputSchema": {**OBJECT, "properties": {"x": {"$ref": "#/$defs/none"}}}},
    "final_answer": {"inputSchema": {**OBJECT, "properties": {"answer": {"type": "string"}}}},
}


def result(method: str, params: Any) -> Any:
    """What the server says to a request; None for those it does not know."""
    if method == "initialize":
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                "serverInfo": {"name": "odd", "version": "1"}}
    if method == "tools/list":
        return {"tools": [{"name": name, **tool} for name, tool in TOOLS.items()]}
    if method == "tools/call":
        return {"content": [{"type": "text", **({} if params["name"] == "half" else {"text": "done"})}]}
    return None


if __name__ == "__main__":
    for line in sys.stdin:
        asked = json.loads(line)
        if "id" in asked:
            said = result(asked["method"], asked.get("params"))
            unknown = {"error": {"code": -32601, "message": "no such method"}}
            answer = {"jsonrpc": "2.0", "id": asked["id"], **(unknown if said is None else {"result": said})}
            print(json.dumps(answer), flush=True)
