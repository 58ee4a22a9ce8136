"""temporary"""
from tasks.language import write_language
from tasks.organism import build_base
def run_language(spec, inputs, out, ctx):
    write_language(out, spec.seed)
def run_organism(spec, inputs, out, ctx):
    build_base(out / spec.MODEL, inputs["language"], spec.size, spec.seed, lambda *a: None)
