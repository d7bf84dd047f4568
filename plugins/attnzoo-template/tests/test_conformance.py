from attnzoo_template import Template

from attnzoo.testing import parametrize_with_checks


@parametrize_with_checks([Template])
def test_conformance(check):
    check()
