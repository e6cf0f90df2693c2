"""Exports behind real OpenAI-compatible servers: start one, talk to it, judge its answers, stop it.

`server` runs any server process, `runtimes` knows the commands of vLLM and llama.cpp, `client` wraps the openai
package, and `judge` compares answers with the torch oracle. `python -m tools.serve_check` puts them together.
"""
