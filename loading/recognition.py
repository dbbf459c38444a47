"""Finds the encoding of a matrix from the dtypes and shapes of its tensors, or explains why there is none."""

import functools
from collections.abc import Iterable, Mapping

from ..kernels.matrix import Matrix
from .encodings import ENCODINGS, Encoding
from .headers import ROLES, SPELLINGS, Header
from .problems import Problem


@functools.lru_cache(maxsize=256)  # headers compare equal regardless of names, so the layers of a model share entries
def recognize(*items: tuple[str, Header]) -> tuple[Encoding, Matrix] | None:
    """(role, header) of each tensor -> the first encoding that fits exactly, and its matrix on the meta device."""
    headers = dict(items)
    encoding = next((each for each in _candidates(headers) if not each.misfits(headers)), None)
    if encoding is None:
        return None
    return encoding, encoding.bind({role: header.meta() for role, header in items})


def _candidates(headers: Mapping[str, Header]) -> list[Encoding]:
    """Encodings with such a weight."""
    weight = headers.get("weight")
    if weight is None or len(weight.shape) != 2 or 0 in weight.shape:
        return []
    return [encoding for encoding in ENCODINGS if weight.dtype in encoding.weight_dtypes]


def explain(matrix: str, headers: Mapping[str, Header]) -> list[Problem]:
    """Says why `recognize` returns None for a matrix, such as "model.layers.0.self_attn.indexer.wk"."""
    weight = headers.get("weight")
    if candidates := _candidates(headers):
        return _explain_scales(matrix, headers, candidates)
    dtypes = dict.fromkeys(dtype for encoding in ENCODINGS for dtype in encoding.weight_dtypes)
    expected = f"a weight in {' or '.join(dtypes)}"
    if foreign := _foreign(headers):
        first = weight or headers[".qweight"]
        advice = f"{foreign} is not supported: keep the indexer in BF16, or requantize it to FP8 or NVFP4"
        return [Problem(first.name, first.file, expected, str(first), advice)]
    if weight is None:
        known = [header for role, header in headers.items() if role in SPELLINGS]
        file = next((header.file for header in headers.values()), "")
        problem = Problem(f"{matrix}.weight", file, "a weight", f"only {_list(known)}" if known else "no tensor of it")
    else:
        expected = "a matrix [N, K]" if weight.dtype in dtypes else expected
        problem = Problem(weight.name, weight.file, expected, str(weight))
    return [problem, *(_stray(header, []) for role, header in headers.items() if role not in SPELLINGS)]


def _foreign(headers: Mapping[str, Header]) -> str:
    """The format of another quantizer, if it shows and nothing here reads it; else ""."""
    if "weight" in headers:
        return {"I8": "INT8", "U32": "MLX"}.get(headers["weight"].dtype, "")
    codes, scales, zeros = (headers.get(role) for role in (".qweight", ".scales", ".qzeros"))
    if codes is None:
        return ""
    # Both store the transpose of a matrix [N, K]. GPTQ packs K, AWQ packs N; both pack N in qzeros [groups, N / pack].
    n = scales.shape[-1:] if scales else ()
    name = "GPTQ or AWQ" if not n else "GPTQ" if codes.shape[1:] == n else "AWQ"
    return f"{name}, {32 * zeros.shape[1] // n[0]} bit" if zeros and len(zeros.shape) == 2 and n and n[0] else name


def _explain_scales(matrix: str, headers: Mapping[str, Header], candidates: list[Encoding]) -> list[Problem]:
    """Problems with the tensors beside a valid weight; names what each candidate would need beside what fits it."""
    misfits = {encoding: encoding.misfits(headers) for encoding in candidates}
    # If the scale fits some candidates, the others are out of the question.
    fitting = [each for each in candidates if not misfits[each].get("scale") and not misfits[each].get("row_scale")]
    best = min(fitting or candidates, key=lambda encoding: len(misfits[encoding]))
    options = []
    for encoding in fitting or candidates:
        if needs := [f"{encoding.spelling(role)} {spec}" for role, spec in misfits[encoding].items() if spec]:
            options.append(f"{' and '.join(needs)} ({encoding.name})")
    weight = headers["weight"]
    expected = f"beside the {weight} weight {'one of ' if len(options) > 1 else ''}{', '.join(options)}"
    others = [header for role, header in headers.items() if role not in misfits[best]]
    problems = []
    for role, spec in misfits[best].items():
        header = headers.get(role)
        if header is None:
            advice = "the codes have no value without it: fetch the shard that holds it, or export the checkpoint again"
            name = f"{matrix}.{best.spelling(role)}"
            problems.append(Problem(name, weight.file, expected, "no such tensor", advice))
        elif spec:
            problems.append(Problem(header.name, header.file, expected, str(header)))
        else:
            problems.append(_stray(header, others if role in SPELLINGS else []))
    return problems


def _stray(header: Header, fitting: Iterable[Header]) -> Problem:
    """A tensor that nothing uses, either because of its suffix or beside tensors that are complete without it."""
    expected = f"nothing beside {_list(fitting)}" if fitting else f"no suffix but {', '.join(ROLES)}"
    return Problem(header.name, header.file, expected, str(header))


def _list(headers: Iterable[Header]) -> str:
    return ", ".join(f"{header.name.rpartition('.')[2]} ({header})" for header in headers)
