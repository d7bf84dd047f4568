from attnzoo_wavelets import Haar, Subband

from attnzoo.testing import parametrize_with_checks


@parametrize_with_checks([Haar, Subband])
def test_conformance(check):
    check()
