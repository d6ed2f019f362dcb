// X(0) X(1) ... for row blocks of a fixed height: one named accumulator a row keeps compilers from spilling arrays.
#pragma once

#define FXQUANT_ROWS_1(X) X(0)
#define FXQUANT_ROWS_2(X) FXQUANT_ROWS_1(X) X(1)
#define FXQUANT_ROWS_3(X) FXQUANT_ROWS_2(X) X(2)
#define FXQUANT_ROWS_4(X) FXQUANT_ROWS_3(X) X(3)
#define FXQUANT_ROWS_5(X) FXQUANT_ROWS_4(X) X(4)
#define FXQUANT_ROWS_6(X) FXQUANT_ROWS_5(X) X(5)
#define FXQUANT_ROWS_7(X) FXQUANT_ROWS_6(X) X(6)
#define FXQUANT_ROWS_8(X) FXQUANT_ROWS_7(X) X(7)
#define FXQUANT_ROWS_9(X) FXQUANT_ROWS_8(X) X(8)
#define FXQUANT_ROWS_10(X) FXQUANT_ROWS_9(X) X(9)
#define FXQUANT_ROWS_11(X) FXQUANT_ROWS_10(X) X(10)
#define FXQUANT_ROWS_12(X) FXQUANT_ROWS_11(X) X(11)
#define FXQUANT_ROWS_13(X) FXQUANT_ROWS_12(X) X(12)
#define FXQUANT_ROWS_14(X) FXQUANT_ROWS_13(X) X(13)
