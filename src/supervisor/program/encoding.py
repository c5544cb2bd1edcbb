# JSON by the C halves of `json`, whose Python half costs 9 ms to import.


class ScannerSettings:
    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, {"NaN": None}.__getitem__
    memo = {}


def refuse(value):
    raise TypeError("Object of type %s is not JSON serializable" % type(value).__name__)


def json_functions():
    try:
        import _json

        scan = _json.make_scanner(ScannerSettings)
        if scan('{"a": [1, 2.5, null]}', 0)[0] != {"a": [1, 2.5, None]}:
            raise ImportError("the C scanner is not the one that this was written for")

        def dumps(value):
            encode = _json.make_encoder(
                {}, refuse, _json.encode_basestring, None, ":", ",", False, False, False
            )
            return "".join(encode(value, 0))

        if dumps({"a": [1, 2.5, None]}) != '{"a":[1,2.5,null]}':
            raise ImportError("the C encoder is not the one that this was written for")
        return (lambda text: scan(text, 0)[0]), dumps
    except Exception:
        import json

        return json.loads, lambda value: json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )


loads, dumps = json_functions()
