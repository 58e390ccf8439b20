"""The gateway over HTTP, in front of real engines, a real router and a real Valkey."""
from tests.serving.conftest import Service
async def test_smoke(service: Service):
    r = await service.client.post("/v1/chat/completions", json={"model":"auto","messages":[{"role":"user","content":"What is 3 plus 4?"}],"temperature":0,"max_tokens":8})
    print(r.status_code, r.headers, r.json())
    assert r.status_code == 200
