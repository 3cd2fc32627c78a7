"""
The four benchmarks that everyone has, as their files are published, in the fields of our problem lines
(data/problems.py).

    set         columns                                                          becomes
    GSM8K       question, answer ("steps #### 72")                               maths
    MATH        problem, solution (with \\boxed{}), level, type; MATH-500: answer  maths
    MBPP        text or prompt, code, test_list, test_setup_code or test_imports   code, call tests
    HumanEval   task_id, prompt, entry_point, canonical_solution, test             code, call tests

read_problems takes these files, so eval.py, rl.py and data/hub.py do. Nothing of a row is executed: the asserts are
read as text, and `assert f(ARGUMENTS) == VALUE` with literal values becomes a call test. A problem with an assert of
another form is left out, since a test less would let wrong programs pass.
"""
import ast
import json
import re
from typing import Any

from configurator import UserError


def problem_line(row: dict) -> dict | None:
    """
    The fields of a problem line for a row of a set above; None for a row of no such set. UserError for a row of a set
    that cannot become a problem, with the reason.
    """
    columns = set(row)
    if columns == {"question", "answer"} and isinstance(row["answer"], str) and "####" in row["answer"]:
        return gsm8k(row)
    if {"problem", "solution"} <= columns and not {"kind", "generations"} & columns:
        return math(row)
    if {"test_list", "code"} <= columns:
        return mbpp(row)
    if {"prompt", "entry_point", "test", "canonical_solution"} <= columns:
        return humaneval(row)
    return None


# ---- maths ----------------------------------------------------------------------------------------------------------

def gsm8k(row: dict) -> dict:
    """answer = steps, "#### ", final number. The steps' calculator marks <<3*4=12>> are taken out."""
    question, answer = text_of(row, "question"), text_of(row, "answer")
    steps, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise UserError("answer has no '#### ' before its final number")
    final = final.strip().replace(",", "")
    return {"kind": "maths", "question": question, "answer": final,
            "reasoning": re.sub(r"<<[^<>]*>>", "", steps).strip(), "solution": f"The answer is \\boxed{{{final}}}."}


def math(row: dict) -> dict:
    """The answer is that of the column, else what the last \\boxed{} of the solution holds. level: "Level 3" or 3."""
    question, solution = text_of(row, "problem"), text_of(row, "solution")
    answer = row["answer"] if isinstance(row.get("answer"), str) else last_boxed(solution)
    if not answer:
        raise UserError("solution has no \\boxed{} with the answer")
    level = re.search(r"\d", str(row.get("level") or ""))
    return {"kind": "maths", "question": question, "answer": answer,
            "level": int(level.group()) if level else 1, "solution": solution}


def last_boxed(text: str) -> str:
    """What the braces of the last \\boxed{} or \\fbox{} hold, "" when there is none."""
    starts = [m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not starts:
        bare = re.findall(r"\\boxed\s+(\S+?)\$", text)       # \boxed 2$ stands in a few solutions of MATH
        return bare[-1] if bare else ""
    depth, start = 1, starts[-1]
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i].strip()
    return ""


# ---- code -----------------------------------------------------------------------------------------------------------

def mbpp(row: dict) -> dict:
    """The question ends with the asserts: without them nobody could know what the function is called."""
    question = text_of(row, "text" if "text" in row else "prompt")
    asserts = [a for a in row["test_list"] if a.strip()]
    entry, tests = call_tests("\n".join(asserts))
    question = f"{question.strip()}\nYour code should pass these tests:\n" + "\n".join(asserts)
    return {"kind": "code", "question": question, "entry": entry,
            "tests": tests, "solution": fenced(text_of(row, "code"))}


def humaneval(row: dict) -> dict:
    """`test` is a function check(candidate) full of asserts; the question is the prompt, a function without a body."""
    prompt, entry = text_of(row, "prompt"), text_of(row, "entry_point")
    _, tests = call_tests(text_of(row, "test"), "candidate")
    return {"kind": "code", "entry": entry, "tests": tests,
            "question": f"Complete this function:\n{fenced(prompt)}",
            "solution": fenced(prompt + text_of(row, "canonical_solution"))}


def fenced(code: str) -> str:
    """A fenced program, as the judge looks for in an answer."""
    return "```python\n" + code.replace("\r\n", "\n").strip("\n") + "\n```"


def call_tests(program: str, name: str = "") -> tuple[str, list[dict]]:
    """
    The asserts of a program -> (name of the function that they call, a call test for each). name: "" = the one that the
    first assert calls. UserError when an assert has another form, or when there is none.
    """
    try:
        nodes = list(ast.walk(ast.parse(program)))
    except (SyntaxError, ValueError, RecursionError):
        raise UserError("its tests are not Python") from None
    if any(isinstance(n, (ast.For, ast.While, ast.If, ast.Try, ast.With)) for n in nodes):
        raise UserError("its tests are a program (loops or conditions), not plain asserts")
    tests = []
    for node in sorted((n for n in nodes if isinstance(n, ast.Assert)), key=lambda n: n.lineno):
        if isinstance(node.test, ast.Constant) and node.test.value:
            continue                                         # assert True, "always"
        try:
            call, expected = call_and_value(node.test)
            name = name or ast.unparse(call.func)
            if ast.unparse(call.func) != name or call.keywords:
                raise ValueError
            tests.append({"kind": "call", "input": json_text([value(a) for a in call.args]),
                          "expected": json_text(expected)})
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            raise UserError(f"its test is not a call with literal values: {ast.unparse(node.test):.80}") from None
    if not tests:
        raise UserError("it has no tests")
    return name, tests


def call_and_value(test: ast.expr) -> tuple[ast.Call, Any]:
    """
    f(..) == value, value == f(..), f(..) is True, f(..), not f(..), abs(f(..) - value) < small and
    math.isclose(f(..), value) -> (the call, the value). The judge compares floats with a tolerance in any case.
    ValueError for another form.
    """
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and isinstance(test.operand, ast.Call):
        return test.operand, False
    if isinstance(test, ast.Call):
        if ast.unparse(test.func) in ("math.isclose", "isclose") and isinstance(test.args[0], ast.Call):
            return test.args[0], float(value(test.args[1]))
        return test, True
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        raise ValueError
    left, op, right = test.left, test.ops[0], test.comparators[0]
    if isinstance(op, (ast.Eq, ast.Is)):
        return (left, value(right)) if isinstance(left, ast.Call) else (as_call(right), value(left))
    if isinstance(op, (ast.Lt, ast.LtE)) and isinstance(left, ast.Call) and ast.unparse(left.func) == "abs":
        inner = left.args[0]
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub) and float(value(right)) <= 1e-3:
            return as_call(inner.left), float(value(inner.right))
    raise ValueError


def as_call(node: ast.expr) -> ast.Call:
    """The node when it is a call, else ValueError."""
    if not isinstance(node, ast.Call):
        raise ValueError
    return node


def value(node: ast.expr) -> Any:
    """The value of a literal, in which numbers may be joined by + - * /. ValueError for anything else."""
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        a, b = value(node.left), value(node.right)
        if type(a) in (int, float) and type(b) in (int, float):
            return (a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub) else
                    a * b if isinstance(node.op, ast.Mult) else a / b)
    return ast.literal_eval(node)


def json_text(plain: Any) -> str:
    """
    A value of a test as the text that a call test carries. JSON knows no tuples (a list stands for one), no sets, no
    bytes and no keys but strings: ValueError or TypeError for these.
    """
    def check(x: Any) -> None:
        if isinstance(x, dict):
            if not all(isinstance(k, str) for k in x):
                raise ValueError("keys of a dict that are no strings")
            x = list(x.values())
        if isinstance(x, (list, tuple)):
            for y in x:
                check(y)
    check(plain)
    return json.dumps(plain, allow_nan=False)


def text_of(row: dict, column: str) -> str:
    """row[column], a text that is not empty; else UserError."""
    if not isinstance(row.get(column), str) or not row[column].strip():
        raise UserError(f"{column} should be text, is {row.get(column)!r:.40}")
    return row[column]
