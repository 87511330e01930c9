"""Do real clients work with `fourfold serve`?

    pip install openai litellm
    python scripts/check_server.py FOURFOLD MODEL

Starts `FOURFOLD serve MODEL` on a free port and runs openai-python (chat, streaming, tools, JSON schema, probabilities,
embeddings), litellm where it is installed, and curl where it is there. Says which checks ran and which were skipped; exits
with 1 if one fails.
"""

import json
import os
import shutil
import subprocess
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # No network.

import openai


def main():
    program, model = sys.argv[1:3]
    command = [program, "serve", model, "--port", "0", "--json", "--alias", "served", "--api-key", "secret"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(server.stdout.readline())["address"]
        base = f"http://{address}/v1"
        client = openai.OpenAI(base_url=base, api_key="secret", max_retries=0)
        messages = [{"role": "user", "content": "Say hello."}]
        call = lambda **more: client.chat.completions.create(model="served", messages=messages, **more)

        answer = call(max_tokens=16, temperature=0)
        assert answer.choices[0].message.role == "assistant" and answer.usage.completion_tokens <= 16
        told = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in call(max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True})
            if chunk.choices
        )
        assert told == answer.choices[0].message.content, (told, answer)
        print("chat, streaming: ok")

        schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"], "additionalProperties": False}
        format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
        value = json.loads(call(max_tokens=64, response_format=format).choices[0].message.content)
        assert 0 <= value["n"] <= 9
        json.loads(call(max_tokens=200, response_format={"type": "json_object"}, temperature=0).choices[0].message.content or "{}")
        print("json_schema, json_object: ok")

        tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": schema}}
        try:
            choice = call(max_tokens=128, tools=[tool], tool_choice="required").choices[0]
            assert choice.finish_reason == "tool_calls" and json.loads(choice.message.tool_calls[0].function.arguments)
            print("tools: ok")
        except openai.BadRequestError as error:
            assert error.param == "tool_choice", error
            print("tools: the model's template has none; refused by name")

        logprobs = call(max_tokens=4, logprobs=True, top_logprobs=3, temperature=0).choices[0].logprobs.content
        assert all(len(entry.top_logprobs) == 3 for entry in logprobs)
        vectors = client.embeddings.create(model="served", input=["a text", "another"]).data
        assert abs(sum(x * x for x in vectors[0].embedding) - 1) < 1e-4 and len(vectors) == 2
        plain = client.completions.create(model="served", prompt="Once", max_tokens=8, temperature=0)
        assert plain.choices[0].finish_reason in ("length", "stop")
        assert [entry.id for entry in client.models.list().data] == ["served"]
        print("logprobs, embeddings, completions, models: ok")

        for wrong, kind in [({"temperature": 900}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)]:
            try:
                client.chat.completions.create(**{"model": "served", "messages": messages, **wrong})
                raise AssertionError(wrong)
            except kind:
                pass
        try:
            openai.OpenAI(base_url=base, api_key="wrong", max_retries=0).models.list()
            raise AssertionError("a wrong key")
        except openai.AuthenticationError:
            print("errors: ok")

        try:
            import litellm

            reply = litellm.completion(model="openai/served", api_base=base, api_key="secret", messages=messages, max_tokens=8)
            assert reply.choices[0].message.content is not None
            print("litellm: ok")
        except ImportError:
            print("litellm: skipped, it is not installed")
        if shutil.which("curl"):
            health = subprocess.run(["curl", "-s", f"http://{address}/health"], capture_output=True, text=True, check=True)
            assert json.loads(health.stdout) == {"status": "ok"}
            print("curl: ok")
        else:
            print("curl: skipped, it is not installed")
    finally:
        server.terminate()
        code = server.wait(timeout=60)
    print("the server ended with", code)
    sys.exit(0 if code in (0, 130) else 1)


main()
